"""What we claim, measured beside a floor in the same run: `make bench`.

Ours and the floor take turns; medians are compared, never a best against a worst. The machine's load is printed with
them. The figures go to build/bench.json.
"""
