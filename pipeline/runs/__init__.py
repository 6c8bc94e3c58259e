"""What a run leaves on disk: journal, lease, provenance, records, and files written atomically."""
