"""Claims, certificates, rosters: what both sides sign and check."""
