"""RequestAuthentication: the tokens of requests, checked and made claims of."""
