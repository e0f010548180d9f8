"""The waypoint's process: listeners, tunnels, HTTP connections, pools; decisions are l7's."""
