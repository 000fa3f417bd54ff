"""Tasks after RULER (Hsieh et al. 2024, arXiv 2404.06654) that need no judge, in texts of any length."""
