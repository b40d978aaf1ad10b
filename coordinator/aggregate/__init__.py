"""From updates to the next version: lift, weigh, reduce, step."""
