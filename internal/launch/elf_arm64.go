package launch

import _ "embed"

//go:embed launch_arm64.elf
var elf []byte
