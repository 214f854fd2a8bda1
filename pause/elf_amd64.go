package pause

import _ "embed"

//go:embed pause_amd64.elf
var elf []byte
