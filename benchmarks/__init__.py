"""What README's figures come from: one file each, prints a table and writes `benchmarks/out/NAME.json`."""
