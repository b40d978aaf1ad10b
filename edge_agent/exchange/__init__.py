"""What goes up and what comes down."""
