"""What is looked at before anything long starts: data, model, memory, disk, access."""
