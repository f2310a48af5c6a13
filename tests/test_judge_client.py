"""The judge client against the miniature's real server and against a loopback server that misbehaves."""
