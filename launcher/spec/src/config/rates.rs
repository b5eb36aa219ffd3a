//! `train.ema_decay`: no number, one, or a list of them.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Numbers that may be written as null, as one number, or as a list.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Rates(pub Vec<f64>);

impl Rates {
    /// One number.
    pub fn one(rate: f64) -> Self {
        Self(vec![rate])
    }
}

impl TryFrom<Value> for Rates {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let number = |value: &Value| value.as_f64().ok_or_else(|| format!("{value} is not a number"));
        match &value {
            Value::Null => Ok(Self::default()),
            Value::Array(items) => Ok(Self(items.iter().map(number).collect::<Result<_, _>>()?)),
            one => Ok(Self(vec![number(one)?])),
        }
    }
}

impl From<Rates> for Value {
    fn from(rates: Rates) -> Value {
        match rates.0[..] {
            [] => Value::Null,
            [one] => one.into(),
            _ => rates.0.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rates_are_written_as_they_are_read() {
        for value in [json!(null), json!(0.999), json!([0.9, 0.99])] {
            let rates: Rates = serde_json::from_value(value.clone()).unwrap();
            assert_eq!(serde_json::to_value(rates).unwrap(), value);
        }
        assert_eq!(serde_json::from_value::<Rates>(json!([0.5])).unwrap(), Rates::one(0.5));
        assert_eq!(serde_json::from_value::<Rates>(json!([])).unwrap(), Rates::default());
        for bad in [json!("x"), json!([0.5, null]), json!({})] {
            assert!(serde_json::from_value::<Rates>(bad).is_err());
        }
    }
}
