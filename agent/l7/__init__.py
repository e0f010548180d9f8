"""The waypoint's decisions: routes, filters, policy. Pure, as `core` is."""
