"""Execution of a run: Ray on this machine or a job's nodes, the driver, and the work of each rank."""
