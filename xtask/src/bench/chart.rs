//! Bar charts as SVG: one bar per VMM, a line where the budget is.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::report::number;

const WIDTH: u32 = 760;
const BAR_HEIGHT: u32 = 34;
/// Room for the title above the bars and the scale below them.
const FRAME: u32 = 84;
/// Room for a letter of a bar's name.
const LETTER: u32 = 7;

pub(super) const OWN: RGBColor = RGBColor(0x1f, 0x77, 0xb4);
pub(super) const OTHER: RGBColor = RGBColor(0xb0, 0xb7, 0xbf);
const BUDGET: RGBColor = RGBColor(0xd6, 0x27, 0x28);

/// A chart.
#[derive(Debug)]
pub struct Chart<'a> {
    /// Above it.
    pub title: &'a str,
    /// Names and figures, from the top.
    pub bars: Vec<(&'a str, f64)>,
    /// The figure to beat.
    pub budget: Option<f64>,
    /// Digits behind the point.
    pub digits: usize,
    /// How many of the bars, from the top, are our own.
    pub own: usize,
}

impl Chart<'_> {
    /// Writes the chart to `path`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.draw(path)
            .with_context(|| format!("Cannot draw {}", path.display()))
    }

    fn draw(&self, path: &Path) -> Result<()> {
        let count = u32::try_from(self.bars.len())?;
        let size = (WIDTH, FRAME + BAR_HEIGHT * count);
        let area = SVGBackend::new(path, size).into_drawing_area();
        area.fill(&WHITE).map_err(said)?;
        let values = self.bars.iter().map(|(_, value)| *value);
        let most = values.chain(self.budget).fold(0.0, f64::max);
        // Room for the figure beside the longest bar.
        let scale = 0.0..(most * 1.15).max(f64::MIN_POSITIVE);
        let mut chart = ChartBuilder::on(&area)
            .caption(self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(26)
            .y_label_area_size(self.names_width())
            .build_cartesian_2d(scale, (0..count).into_segmented())
            .map_err(said)?;
        let name = |position: &SegmentValue<u32>| match position {
            SegmentValue::CenterOf(place) => self
                .at(count, *place)
                .map_or("", |(name, _)| name)
                .to_owned(),
            _ => String::new(),
        };
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(TRANSPARENT)
            .y_labels(self.bars.len())
            .y_label_formatter(&name)
            .x_label_formatter(&|value| number(*value, self.digits))
            .label_style(("sans-serif", 13))
            .draw()
            .map_err(said)?;
        let bars = (0..count).filter_map(|place| {
            let (_, value) = self.at(count, place)?;
            let color = if self.is_own(count, place) {
                OWN
            } else {
                OTHER
            };
            let corners = [
                (0.0, SegmentValue::Exact(place)),
                (value, SegmentValue::Exact(place + 1)),
            ];
            let mut bar = Rectangle::new(corners, color.filled());
            bar.set_margin(5, 5, 0, 0);
            Some(bar)
        });
        chart.draw_series(bars).map_err(said)?;
        let beside = Pos::new(HPos::Left, VPos::Center);
        let style = ("sans-serif", 13).into_font().color(&BLACK).pos(beside);
        let figures = (0..count).filter_map(|place| {
            let (_, value) = self.at(count, place)?;
            let text = format!(" {}", number(value, self.digits));
            Some(Text::new(
                text,
                (value, SegmentValue::CenterOf(place)),
                style.clone(),
            ))
        });
        chart.draw_series(figures).map_err(said)?;
        if let Some(budget) = self.budget {
            let ends = [
                (budget, SegmentValue::Exact(0)),
                (budget, SegmentValue::Exact(count)),
            ];
            let line = PathElement::new(ends, BUDGET.stroke_width(2));
            chart.draw_series([line]).map_err(said)?;
        }
        area.present().map_err(said)
    }

    /// Whether the bar at `place` from the bottom is our own.
    fn is_own(&self, count: u32, place: u32) -> bool {
        let from_top = count.saturating_sub(place + 1);
        usize::try_from(from_top).is_ok_and(|index| index < self.own)
    }

    /// Room for the names.
    fn names_width(&self) -> u32 {
        let longest = self.bars.iter().map(|(name, _)| name.chars().count()).max();
        let letters = u32::try_from(longest.unwrap_or(0)).unwrap_or(0);
        (letters * LETTER).max(150)
    }

    /// The bar at `place` from the bottom.
    fn at(&self, count: u32, place: u32) -> Option<(&str, f64)> {
        let index = count.checked_sub(place + 1)?;
        self.bars.get(usize::try_from(index).ok()?).copied()
    }
}

/// The library's errors borrow what they tell of.
pub(super) fn said(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("{error}")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn shows_names_figures_and_lengths() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("chart.svg");
        let chart = Chart {
            title: "Exits",
            bars: vec![("ours", 1500.0), ("theirs", 3000.0)],
            budget: Some(2910.0),
            digits: 0,
            own: 1,
        };
        chart.write(&path).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        for text in ["Exits", "ours", "theirs", "1,500", "3,000"] {
            assert!(svg.contains(text), "{text} is not in {svg}");
        }
        let width = |color: &str| -> f64 {
            let bar = svg
                .lines()
                .find(|line| line.starts_with("<rect") && line.contains(color));
            let width = bar.unwrap().split("width=\"").nth(1).unwrap();
            width.split('"').next().unwrap().parse().unwrap()
        };
        let ratio = width("#B0B7BF") / width("#1F77B4");
        assert!((1.95..2.05).contains(&ratio), "{ratio}");
    }
}
