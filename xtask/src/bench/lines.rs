//! Line charts as SVG: figures over a number.

use std::path::Path;

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::chart::{OTHER, OWN, said};
use super::report::number;

const SIZE: (u32, u32) = (760, 360);

/// A chart.
#[derive(Debug)]
pub(super) struct Lines<'a> {
    /// Above it.
    pub title: &'a str,
    /// Below and beside it.
    pub axes: [&'a str; 2],
    /// Names, and places with figures. The first is our own colour.
    pub lines: Vec<(&'a str, Vec<(f64, f64)>)>,
}

impl Lines<'_> {
    /// Writes the chart to `path`.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        self.draw(path)
            .with_context(|| format!("Cannot draw {}", path.display()))
    }

    fn draw(&self, path: &Path) -> Result<()> {
        let area = SVGBackend::new(path, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(said)?;
        let points = || self.lines.iter().flat_map(|(_, points)| points);
        let far = points().map(|(x, _)| *x).fold(1.0, f64::max);
        let high = points().map(|(_, y)| *y).fold(1.0, f64::max);
        let [across, up] = self.axes;
        let mut chart = ChartBuilder::on(&area)
            .caption(self.title, ("sans-serif", 18))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..far * 1.05, 0.0..high * 1.1)
            .map_err(said)?;
        chart
            .configure_mesh()
            .light_line_style(TRANSPARENT)
            .x_desc(across)
            .y_desc(up)
            .x_label_formatter(&|value| number(*value, 0))
            .y_label_formatter(&|value| number(*value, 0))
            .label_style(("sans-serif", 13))
            .draw()
            .map_err(said)?;
        for (index, (name, points)) in self.lines.iter().enumerate() {
            let color = if index == 0 { OWN } else { OTHER };
            let style = color.stroke_width(2);
            let dots = points.iter().map(|at| Circle::new(*at, 3, color.filled()));
            chart.draw_series(dots).map_err(said)?;
            chart
                .draw_series([PathElement::new(points.clone(), style)])
                .map_err(said)?
                .label(*name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperLeft)
            .label_font(("sans-serif", 13))
            .draw()
            .map_err(said)?;
        area.present().map_err(said)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn has_all_lines_with_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines.svg");
        let lines = Lines {
            title: "Memory",
            axes: ["pods", "MiB"],
            lines: vec![
                ("ours", vec![(1.0, 4.0), (50.0, 200.0)]),
                ("theirs", vec![(1.0, 9.0), (50.0, 450.0)]),
            ],
        };
        lines.write(&path).unwrap();
        let svg = std::fs::read_to_string(path).unwrap();
        for text in ["Memory", "pods", "MiB", "ours", "theirs"] {
            assert!(svg.contains(text), "{text} is not in {svg}");
        }
        assert!(svg.matches("<polyline").count() >= 2);
    }
}
