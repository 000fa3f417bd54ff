"""What the commands of every package of this project print, and how they end. For packages of this project."""
