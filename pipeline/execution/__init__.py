"""Where a run computes: Ray here or over a job's nodes, the driver, and the work of each rank."""
