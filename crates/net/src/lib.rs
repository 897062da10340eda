//! Host ends of guest network interfaces: tap and passt.
