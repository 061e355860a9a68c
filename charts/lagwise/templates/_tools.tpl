{{/* A pod that runs one of the command's modules with the operator's account: it looks, and changes
     nothing on the bus. scope: root, imageOf, module, arguments, token. */}}
{{- define "lagwise.toolPodSpec" -}}
{{- $values := index .root.Values .imageOf -}}
serviceAccountName: {{ ternary (include "lagwise.objectName" (dict "root" .root "role" "operator")) (include "lagwise.objectName" (dict "root" .root "role" "env_agents")) .token }}
automountServiceAccountToken: {{ .token }}
enableServiceLinks: false
terminationGracePeriodSeconds: 10
securityContext:
  {{- include "lagwise.podSecurity" .root | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- include "lagwise.placement" $values }}
containers:
  - name: tool
    {{- include "lagwise.containerBasics" (dict "root" .root "imageOf" .imageOf) | nindent 4 }}
    command: [python, -m, {{ .module }}]
    args:
      - --config
      - /etc/lagwise/values.yaml
      {{- range .arguments }}
      - {{ . | quote }}
      {{- end }}
    env:
      - name: POD_NAMESPACE
        valueFrom:
          fieldRef:
            apiVersion: v1
            fieldPath: metadata.namespace
      {{- include "lagwise.cacheEnv" . | nindent 6 }}
      {{- include "lagwise.busEnv" (dict "root" .root "account" "operator") | nindent 6 }}
      {{- if .token }}
      {{- with $values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      {{- end }}
    resources:
      {{- if .token }}
      {{- $values.resources | default dict | toYaml | nindent 6 }}
      {{- else }}
      requests:
        cpu: 100m
        memory: 128Mi
      {{- end }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      - name: config
        mountPath: /etc/lagwise
        readOnly: true
      {{- include "lagwise.busMounts" (dict "root" .root "account" "operator") | nindent 6 }}
      {{- if .token }}
      {{- with $values.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  - name: config
    configMap:
      name: {{ include "lagwise.objectName" (dict "root" .root "role" "config") }}
  {{- include "lagwise.busVolumes" (dict "root" .root "accounts" (list "operator")) | nindent 2 }}
  {{- if .token }}
  {{- with $values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- end }}
{{- end -}}
