package builtin

// forward lets the devices through which answers come pass them on.
func (d *Driver) forward() error {
	return nil
}
