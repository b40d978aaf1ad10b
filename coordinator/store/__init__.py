"""What lasts: the ledger's rows, versions, backups."""
