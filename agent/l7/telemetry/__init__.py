"""What is told of requests: metrics, access logs, spans; and the Telemetry API that shapes it."""
