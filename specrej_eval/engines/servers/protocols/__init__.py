"""What servers are asked, and how their answers are read: one file each."""
