"""What both programs need to be programs."""
