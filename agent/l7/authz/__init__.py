"""AuthorizationPolicy as a waypoint enforces it."""
