# The agent as a Windows task that starts with the machine, runs at low priority and is restarted when it ends. Not run by us yet.
#   powershell -ExecutionPolicy Bypass -File edge-agent.ps1 install | remove | status
# Python 3.10 or newer and `pip install rankfleet[agent]` in C:\ProgramData\edge-agent\venv are expected.
param([ValidateSet('install', 'remove', 'status')][string]$What = 'status')
$ErrorActionPreference = 'Stop'
$Home_ = Join-Path $env:ProgramData 'edge-agent'
$Program = Join-Path $Home_ 'venv\Scripts\edge-agent.exe'
$Config = Join-Path $Home_ 'agent.yaml'
switch ($What) {
    'install' {
        if (-not (Test-Path $Program)) { throw "$Program is not there: make the virtual environment first" }
        if (-not (Test-Path $Config)) { throw "$Config is not there: copy packaging/config/agent.yaml and set state_dir" }
        # Keys lie here: nobody but the service's account and administrators may read them.
        icacls $Home_ /inheritance:r /grant 'NT AUTHORITY\LOCAL SERVICE:(OI)(CI)F' 'BUILTIN\Administrators:(OI)(CI)F' | Out-Null
        $action = New-ScheduledTaskAction -Execute $Program -Argument "run --config `"$Config`""
        $trigger = New-ScheduledTaskTrigger -AtStartup
        $who = New-ScheduledTaskPrincipal -UserId 'NT AUTHORITY\LOCAL SERVICE' -LogonType ServiceAccount
        $settings = New-ScheduledTaskSettingsSet -RestartCount 999 -RestartInterval (New-TimeSpan -Minutes 1) `
            -ExecutionTimeLimit ([TimeSpan]::Zero) -Priority 8 -StartWhenAvailable -DontStopIfGoingOnBatteries -AllowStartIfOnBatteries
        Register-ScheduledTask -TaskName 'edge-agent' -Action $action -Trigger $trigger -Principal $who -Settings $settings -Force | Out-Null
        Start-ScheduledTask -TaskName 'edge-agent'
    }
    'remove' { Stop-ScheduledTask -TaskName 'edge-agent' -ErrorAction SilentlyContinue; Unregister-ScheduledTask -TaskName 'edge-agent' -Confirm:$false }
    'status' { Get-ScheduledTask -TaskName 'edge-agent' | Get-ScheduledTaskInfo; & $Program status --config $Config }
}
