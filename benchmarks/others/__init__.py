"""Other federated simulators on the workload of benchmarks/simulator.py, a process tree each."""
