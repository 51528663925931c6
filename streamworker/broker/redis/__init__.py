"""Connections to Redis: URL, errors, clients, pools, cluster, Sentinel. Knows commands and scripts, and no job."""
