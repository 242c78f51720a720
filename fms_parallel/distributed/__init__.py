"""Start-up, mesh and collectives: how ranks find each other and talk."""
