"""Ray Serve deployments, the history store and the HTTP schemas."""
