"""The service on a device: profiles it, trains when asked, keeps its update until the coordinator has it."""
