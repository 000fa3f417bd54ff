"""What the client and the service must do alike, byte by byte. For packages of this project; users call `Client`."""
