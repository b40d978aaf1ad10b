"""All that devices touch: messages, uploads, downloads, HTTPS."""
