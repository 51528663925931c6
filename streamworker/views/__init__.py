"""Read models: what an operator sees of a job, a queue or a worker, as frozen rows. Shared by command line and web."""
