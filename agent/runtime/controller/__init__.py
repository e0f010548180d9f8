"""The controller of waypoints: one of several replicas leads."""
