use super::*;

#[test]
fn words_are_read_and_written() {
    for word in ["best", "last", "ema", "ema:0.9999", "runs/a/model.safetensors"] {
        assert_eq!(word.parse::<Weights>().unwrap().to_string(), word);
    }
    assert_eq!("ema:0.9999".parse(), Ok(Weights::Ema(Some(0.9999))));
    for word in ["", "ema:", "ema:x", "ema:1", "ema:NaN"] {
        assert!(word.parse::<Weights>().is_err(), "{word}");
    }
}
