package launch

import _ "embed"

//go:embed launch_amd64.elf
var elf []byte
