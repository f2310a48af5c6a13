"""Pools from public files: records, image checks, shards, the report, and published lists of rows."""
