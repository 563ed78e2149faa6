//! Dimensions that exporters write as expressions of symbols, such as `past + 1` or `2*batch`.
//!
//! Sums, differences, products and whole quotients of names and numbers, with parentheses. A text that is not such an
//! expression is a plain name.

/// A token of an expression.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Name(String),
    Number(u64),
    Operator(char),
}

/// Longest text that is read as an expression, in bytes.
const LENGTH_LIMIT: usize = 256;

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    if text.len() > LENGTH_LIMIT {
        return None;
    }
    while let Some(first) = rest.chars().next() {
        let word = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
        let end = rest.find(|c| !word(c)).unwrap_or(rest.len());
        let length = if first.is_ascii_digit() {
            tokens.push(Token::Number(rest[..end].parse().ok()?));
            end
        } else if word(first) {
            tokens.push(Token::Name(rest[..end].to_owned()));
            end
        } else if "+-*/()".contains(first) {
            tokens.push(Token::Operator(first));
            // `//` divides like `/`: sizes are whole.
            if rest.starts_with("//") { 2 } else { 1 }
        } else {
            return None;
        };
        rest = rest[length..].trim_start();
    }
    Some(tokens)
}

/// Names inside the text when it is an expression; the text itself otherwise.
pub(crate) fn symbols(text: &str) -> Vec<String> {
    let Some(tokens) = tokens(text) else { return vec![text.to_owned()] };
    let mut names: Vec<String> = Vec::new();
    for token in tokens {
        if let Token::Name(name) = token
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    if names.is_empty() { vec![text.to_owned()] } else { names }
}

/// Value of the expression; `None` when a symbol is open, the text is a plain name or no expression, a quotient is not
/// whole, or the value is negative or overflows.
pub(crate) fn evaluate(text: &str, size: &dyn Fn(&str) -> Option<u64>) -> Option<u64> {
    let tokens = tokens(text)?;
    if tokens.len() < 2 {
        return None;
    }
    let mut parser = Parser { tokens: &tokens, size };
    let value = parser.sum()?;
    if parser.tokens.is_empty() { u64::try_from(value).ok() } else { None }
}

/// Recursive descent; [`LENGTH_LIMIT`] bounds the depth.
struct Parser<'a> {
    tokens: &'a [Token],
    size: &'a dyn Fn(&str) -> Option<u64>,
}

impl Parser<'_> {
    fn accept(&mut self, operators: &str) -> Option<char> {
        let (Token::Operator(operator), rest) = self.tokens.split_first()? else { return None };
        operators.contains(*operator).then(|| {
            self.tokens = rest;
            *operator
        })
    }

    fn sum(&mut self) -> Option<i128> {
        let mut value = self.product()?;
        while let Some(operator) = self.accept("+-") {
            let right = self.product()?;
            value = if operator == '+' { value.checked_add(right)? } else { value.checked_sub(right)? };
        }
        Some(value)
    }

    fn product(&mut self) -> Option<i128> {
        let mut value = self.factor()?;
        while let Some(operator) = self.accept("*/") {
            let right = self.factor()?;
            value = match operator {
                '*' => value.checked_mul(right)?,
                _ if right != 0 && value % right == 0 => value / right,
                _ => return None,
            };
        }
        Some(value)
    }

    fn factor(&mut self) -> Option<i128> {
        if self.accept("(").is_some() {
            let value = self.sum()?;
            return self.accept(")").map(|_| value);
        }
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        match first {
            Token::Name(name) => (self.size)(name).map(i128::from),
            Token::Number(number) => Some(i128::from(*number)),
            Token::Operator(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Option<u64> {
        evaluate(text, &|name| match name {
            "past" => Some(6),
            "batch.1" => Some(2),
            _ => None,
        })
    }

    #[test]
    fn computes_sums_products_and_quotients() {
        assert_eq!(value("past + 1"), Some(7));
        assert_eq!(value("2*past-batch.1"), Some(10));
        assert_eq!(value("(past + 2) // batch.1 * 3"), Some(12));
    }

    #[test]
    fn refuses_what_has_no_whole_value() {
        for text in ["past", "past + other", "past / 4", "batch.1 - past", "past +", "past 1", "(past", "past ? 1"] {
            assert_eq!(value(text), None, "{text}");
        }
        assert_eq!(value(&"(".repeat(10_000)), None);
    }

    #[test]
    fn names_the_symbols_once() {
        assert_eq!(symbols("past + new + past"), ["past", "new"]);
        assert_eq!(symbols("unk?1"), ["unk?1"]);
    }
}
