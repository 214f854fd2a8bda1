package member

import _ "embed"

//go:embed monitor_amd64.elf
var monitorELF []byte
