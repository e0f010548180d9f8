"""What `meshbpf check` looks at, one module an area; each gives a `Category`."""
