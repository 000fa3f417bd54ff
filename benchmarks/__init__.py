"""The benchmarks (`make bench`): each claim of the project is measured beside a floor or a peer in the same run.

This project and its rivals take turns, and their medians are compared, never a best against a worst. The machine's load
average is printed with the figures, which go to build/bench.json. docs/benchmarks.md says what each row measures.
"""
