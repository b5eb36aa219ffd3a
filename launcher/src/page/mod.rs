//! A page for runs: one HTML file that needs no network, with curves that can be hovered and zoomed.
//!
//! The page's program draws what [`gather()`] collected, as JSON within the page.
//!
//! Architecture invariant: reads records; the page holds text of users as text alone, never as markup.

mod gather;

pub use gather::{Gathered, gather};

use serde_json::{Value, json};

const STYLE: &str = include_str!("page.css");
const PROGRAM: &str = include_str!("page.js");

/// The page of one run, or of several beside each other. `made`: a line on when and by what it was made.
pub fn page(runs: &[Gathered], made: &str) -> String {
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let title = names.join(", ");
    let facts = gather::facts(runs);
    let differs = gather::differs(runs);
    let data = json!({
        "title": title,
        "made": made,
        "facts": facts,
        "differs": differs,
        "runs": runs.iter().map(|run| &run.data).collect::<Vec<&Value>>(),
    });
    // No `</script>` can come of it, whatever a run is called.
    let data = data.to_string().replace('<', "\\u003c");
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'; img-src data:\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main></main>\n\
         <script type=\"application/json\" id=\"data\">{data}</script>\n<script>\n{PROGRAM}</script>\n</body>\n</html>\n",
        escaped(&title)
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_needs_no_network_and_a_name_is_no_markup() {
        let name = "</script><script>alert(1)</script>";
        let run = Gathered { name: name.into(), data: json!({"name": name}), ..Gathered::default() };
        let page = page(&[run], "made");
        assert_eq!(page.matches("<script").count(), 2, "{page}");
        let fetched = page.replace("http://www.w3.org/2000/svg", "");
        assert!(!fetched.contains("http://") && !fetched.contains("https://"));
        assert!(page.contains("&lt;/script&gt;"));
    }
}
