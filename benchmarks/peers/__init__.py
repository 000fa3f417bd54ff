"""The peers are programs that one would otherwise use. build/peers/bin/python runs each as a worker of
`benchmarks.lines`."""
