"""This folder shows where cost grows: one thing is made larger, from point to point, and all else stays as it is.
`python -m benchmarks.growth` measures the points, and `python -m benchmarks.growth.page` writes docs/growth.md."""
