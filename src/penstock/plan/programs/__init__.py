"""What every rank does, proved and carried out."""
