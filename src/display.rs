//! How numbers and foreign text are shown to people.

/// Bytes in decimal units, such as `4.18 GB`.
pub fn decimal_size(bytes: u64) -> String {
    scaled(bytes, 1000.0, ["B", "kB", "MB", "GB", "TB", "PB"])
}

/// Bytes in binary units, such as `3.89 GiB`.
pub fn binary_size(bytes: u64) -> String {
    scaled(bytes, 1024.0, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

fn scaled(bytes: u64, step: f64, units: [&str; 6]) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= step && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", units[unit]) }
}

/// The end of a line of closing facts: `, peak memory 1.23 GB`, or nothing where the system does not tell.
pub fn peak_memory(bytes: Option<u64>) -> String {
    bytes.map_or_else(String::new, |bytes| format!(", peak memory {}", decimal_size(bytes)))
}

/// A count with thousands separators, such as `1,543,714,304`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A figure with six significant digits, as files and reports hold it.
pub(crate) fn six_digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

/// Text from a file made safe for a terminal: control characters and invisible direction marks are escaped.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        let direction_mark = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || direction_mark {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_counts_are_readable() {
        assert_eq!(decimal_size(999), "999 B");
        assert_eq!(decimal_size(4_180_000_000), "4.18 GB");
        assert_eq!(binary_size(1 << 30), "1.00 GiB");
        assert_eq!(count(1_543_714_304), "1,543,714,304");
        assert_eq!(count(100), "100");
    }

    #[test]
    fn terminal_escapes_are_shown_not_obeyed() {
        assert_eq!(printable("a\u{1b}[31m\nb"), "a\\u{1b}[31m\\nb");
    }
}
