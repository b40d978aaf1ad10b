"""The service and CLI on one machine: plans rounds, gathers updates, keeps every version of the adapter."""
