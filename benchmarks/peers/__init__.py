"""Other job queues on the same workload: each a small script that runs in an environment of its own."""
