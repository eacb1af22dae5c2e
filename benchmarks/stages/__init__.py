"""Pipeline stages: planning against brute force, simulated clusters, real ranks."""
