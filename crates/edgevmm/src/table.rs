//! Tables for people.

/// Lays rows out in columns, the first row being the head.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().enumerate();
        let line: String = cells
            .map(|(i, cell)| format!("{cell:<w$}   ", w = width(i)))
            .collect();
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest() {
        let row = |cells: [&str; 3]| cells.map(ToOwned::to_owned);
        let rows = [row(["A", "LONG", "C"]), row(["\u{fc}\u{fc}", "b", ""])];
        assert_eq!(table(&rows), "A    LONG   C\n\u{fc}\u{fc}   b\n");
    }
}
