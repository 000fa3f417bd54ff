"""The measurements on real text behind `kvbank eval`, and the figures that are drawn of them."""
