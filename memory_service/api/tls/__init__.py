"""How the ports of the service speak TLS: the certificate, its renewal while the service runs, and its end."""
